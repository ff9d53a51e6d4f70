from longcat_lab.cli import main

main()
