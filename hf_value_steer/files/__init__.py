"""What is written, read, kept and uploaded; nothing here knows a head."""
