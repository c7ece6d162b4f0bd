"""The examples of a run: read from files, folders, the Hub or a generator, and divided into parts."""
