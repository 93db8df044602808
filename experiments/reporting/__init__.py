"""Results: rows, tables, pages and reports."""
