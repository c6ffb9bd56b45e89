"""The gRPC server: everything between a socket and the predictor."""
