"""A row becomes token ids: columns, chat template, tokens, prompt and completions, truncation."""
