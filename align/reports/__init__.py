"""One run -> report.json -> one self-contained HTML page."""
