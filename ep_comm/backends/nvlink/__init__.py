"""The backend of one host's GPUs, over NVLink."""
