"""From a row as it lies in a file to a `Conversation`: formats, how they are recognised, rows made of rows."""
