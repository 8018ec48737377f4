"""What people are shown: figures, pages, tables and notes.

Whatever writes a file here writes it whole, and raises ``DiskError`` where it cannot.
"""
