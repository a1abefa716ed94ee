"""Adapters laid into a base or into one another, tensor by tensor."""
