"""The forms in which rows are written: which one a row is in, and what the row means."""

from chatglm_ptuning.data.forms.detection import FORMS, MESSAGE_FORMS, Columns, find_form, to_conversation, understand

__all__ = ["FORMS", "MESSAGE_FORMS", "Columns", "find_form", "to_conversation", "understand"]
