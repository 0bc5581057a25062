class ImportedBase:
    def drain(self):
        return []
