"""Other libraries' layers and files, read into ours; each library is imported only when used."""
