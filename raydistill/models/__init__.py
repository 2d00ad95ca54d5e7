"""What the mathematics is applied to: four protocols, and networks, codecs and encoders that follow them."""
