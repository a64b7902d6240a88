"""`slicediff conform`: tests that a server keeps its promises to a scanner whatever goes wrong."""
