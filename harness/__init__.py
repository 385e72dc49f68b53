"""Asks the question: configuration -> trials -> rows -> figures, tables, verdicts."""
