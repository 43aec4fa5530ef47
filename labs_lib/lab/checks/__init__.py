"""The checks, one module per lab (lab00.py, lab01.py, ...), each loaded when one of its names is asked for."""
