"""Runs that leave a folder: preprocessing, training, exposure bias."""
