"""Skeletons and solutions of the exercises: copied to the reader's folder and run, never imported."""
