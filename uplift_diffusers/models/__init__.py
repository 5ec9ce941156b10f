"""The networks: UPLiFT and the small autoencoder of the embedded bundle."""
