"""What travels between client and server: generated stubs (never edited), and weights as a stream of bytes."""
