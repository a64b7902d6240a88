"""`slicediff conform`: what a server promises a scanner, tried with everything that goes wrong."""
