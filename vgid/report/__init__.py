"""What people are shown: figures, pages, tables and notes."""
