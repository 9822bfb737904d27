"""The files of the source: found, opened for reading, proved."""
