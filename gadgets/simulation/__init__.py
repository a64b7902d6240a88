"""Simulated scans: a volume or phantom, seen by coils, as the lines of a complete ISMRMRD scan."""
