"""Data sets of faces with cameras, in EG3D's layout."""
