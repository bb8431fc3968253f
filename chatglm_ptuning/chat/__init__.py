"""Chats of the family: messages, and one chat format for each way in which its bases were taught to chat."""
