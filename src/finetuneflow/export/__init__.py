"""Leave with the result: adapter, merged weights, archive and report, each checked by loading it again."""
