"""Every method of the course from scratch, one file each, readable top to bottom with torch alone.

These functions and classes are the solutions of the labs' exercises: what a notebook inlines is what the
tests prove. Wrong arguments raise ValueError, as in torch; only io.py and the *_io.py files, which meet what lies on a
disk, raise LabsError.
"""
