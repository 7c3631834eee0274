"""Turn a row into a tokenised pair; `transform` lists the steps in their order."""
