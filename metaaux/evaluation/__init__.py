"""Measuring: inversion methods against each other (Tables 1 and 3), editing (Table 2), and generators."""
