"""plugins.allocate"""
