"""Backbone, projector and the multi-view objectives."""
