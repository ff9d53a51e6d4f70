// All operators as one library.

#include "activation.cpp"
#include "attention.cpp"
#include "indexing.cpp"
#include "mixture.cpp"
#include "selected_scores.cpp"
#include "sparse_attention.cpp"
