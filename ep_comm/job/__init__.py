"""The processes of a job: their ranks, where they meet, and how they end."""
