"""What outlives a request: records in a store, one writer at a time, and the interactive sessions made of them. Knows nothing of HTTP."""
