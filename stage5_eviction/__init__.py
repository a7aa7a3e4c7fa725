"""Stage 5, optional: which keys a full cache keeps."""
