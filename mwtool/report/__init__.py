"""One HTML page for the documents of one model: figures, tables, verdicts, settings and commands."""
