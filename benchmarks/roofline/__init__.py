"""Operations and bytes of a model beside what the processor can do."""
