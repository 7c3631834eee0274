"""Turn a row into a tokenised pair; `transform` names the stations in their order."""
