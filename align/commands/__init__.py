"""What each verb writes into a folder."""
