"""Model cards and results as text, made of documents: of plain values, and of no model."""
