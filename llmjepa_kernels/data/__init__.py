"""Data: from files and chats to examples."""
