"""From a `Conversation` to text and tokens: chat templates, where each turn's text lies, and the templates that we ship."""
