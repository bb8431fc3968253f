"""Messages, and the chat formats of the family."""
