"""What a run is, apart from how it is divided over machines: what may change when it goes on."""
