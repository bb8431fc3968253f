class ChatMixin: pass
