"""What `lab.runs` is made of: runs found in folders, their table, their comparison."""
