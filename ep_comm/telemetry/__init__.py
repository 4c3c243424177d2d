"""What each operation moved and whom it waited for, and what is waited for now."""
