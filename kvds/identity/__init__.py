"""Identity of files, models and tokenizers by content, whatever they are called; a folder's one owner."""
