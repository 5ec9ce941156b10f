"""The networks: UPLiFT itself and the small autoencoder of the embedded bundle."""
