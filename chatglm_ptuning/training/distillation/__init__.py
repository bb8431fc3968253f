"""A document as a prefix: self-study, the teacher's distributions, and the command."""
