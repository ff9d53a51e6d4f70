// All operators as one library.

#include "activation.cpp"
#include "attention.cpp"
#include "mixture.cpp"
