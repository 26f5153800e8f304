"""plugins.images"""
